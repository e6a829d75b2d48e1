"""Recipes for real corpora: documents out of Debian packages, downloaded with apt and never installed.

`sources` is the table; `formats` reads what lies in the packages; `apt` gets them; `recipe` writes the corpus.
"""

from data.get.recipe import MANIFEST, Corpus, Written, run
from data.get.sources import RECIPES

__all__ = ["MANIFEST", "RECIPES", "Corpus", "Written", "run"]
