"""The recipes for corpora: what lies in packages, on hand-made ones; and apt, from mirrors made of files."""

import gzip
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import main
from data.get import formats, recipe, run
from data.get.markup import decode, strip_html, strip_osis
from data.get.r_data import vectors
from data.get.sources import ANARCHISM_PAGE, DEBIAN, HANDBOOK_PAGE, KERNEL_PAGE, POSTGRES_PAGE

ROOT = Path(__file__).resolve().parent.parent
LONG = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want. " * 2
)


# Formats


def test_files_of_text_unpacked_and_in_the_order_of_names() -> None:
    files = {"b/x.rst.gz": gzip.compress(b"caf\xc3\xa9\r\n"), "a.pod": b"\xef\xbb\xbfcaf\xe9", "a.rst": b"caf\xe9"}
    found = list(formats.text(files))
    assert found == [("a.pod", "ï»¿café"), ("a.rst", "café"), ("b/x.rst", "café\n")]
    assert decode(b"\xef\xbb\xbfcaf\xc3\xa9") == "café"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<html><head><title>no</title></head><body class='x'><p>A &amp; B</p>\n <p>C\n  D</p></body>", "A & B\n\nC D"),
        ("<body>x<script>if (a < b) {}</script><!-- no -> no -->y<STYLE>p {}</STYLE>z</body>", "xyz"),
        (
            "<body><h1>T<a class='y' href='#'>u</a>V</h1><pre>a\n    b &lt; <b>c</b>\n</pre>d</body>",
            "TuV\n\na\n    b < c\n\nd",
        ),
        ('<body><h1>T<a class="headerlink" href="#t">¶</a></h1>x<br/>y</body>', "T\nx\ny"),
        (
            "<body><table><tr><td>a</td><td>b</td></tr><tr><th>c</th></tr></table>1 < 2 &nbsp; 3</body>",
            "a b\n\nc\n\n1 < 2   3",
        ),
        ("no marks: <em>a</em>", "no marks: a"),
        ("<body><ul><li>a</li><li>b</li></ul><p></p><p></p>c", "a\n\nb\n\nc"),
    ],
    ids=["blocks", "dropped", "preformatted", "headerlink", "table", "bare", "list"],
)
def test_html_becomes_text(page: str, text: str) -> None:
    assert strip_html(page) == text


@pytest.mark.parametrize(
    ("form", "page"),
    [
        (ANARCHISM_PAGE, '<body><p>text</p> <div id="book-navigation-2"><a>up</a></div></body>'),
        (
            HANDBOOK_PAGE,
            '<body><ul class="docnav top"><li>Prev</li></ul><p>text</p><ul class="docnav"><li>Next</li></ul>',
        ),
        (KERNEL_PAGE, '<body>menu<div role="main" class="document"><p>text</p></div><footer>Next</footer></body>'),
        (KERNEL_PAGE, '<body>menu<div class="body" role="main">text</div><div class="clearer"></div>Next</body>'),
        (
            POSTGRES_PAGE,
            '<body><div class="navheader"><p>Prev</p><hr /></div>text<div class="navfooter">Next</div></body>',
        ),
    ],
    ids=["anarchism", "handbook", "kernel 6.1", "kernel 6.12", "postgres"],
)
def test_of_a_page_only_its_text_is_taken(form: formats.Html, page: str) -> None:
    assert list(form({"a/b.html": page.encode()})) == [("a/b.html", "text")]


def base64_number(number: int) -> str:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return (base64_number(number // 64) if number >= 64 else "") + digits[number % 64]


def dictionary(entries: list[tuple[list[str], str]]) -> dict[str, bytes]:
    """A dictionary in dictd's form: headwords of each entry, and its text."""
    lines, content = [], b""
    for words, text in entries:
        span = f"{base64_number(len(content))}\t{base64_number(len(text.encode()))}"
        lines += [f"{word}\t{span}\n" for word in words]
        content += text.encode()
    return {"d.index": "".join(sorted(lines)).encode(), "d.dict.dz": gzip.compress(content)}


def test_a_dictionary_has_a_document_an_entry() -> None:
    assert [base64_number(n) for n in (0, 63, 64, 64**3)] == ["A", "/", "BA", "BAAA"]
    files = dictionary(
        [
            (["00-database-info"], "about\n" * 5000),
            (["zebra", "zebras"], "Zebra: a horse with stripes\n"),
            (["ant"], "Ant: an insect\n"),
            (["ant"], "Ant: a build tool, für Java\n"),
        ]
    )
    assert list(formats.dictd(files)) == [
        ("zebra", "Zebra: a horse with stripes\n"),
        ("ant", "Ant: an insect\n"),
        ("ant (2)", "Ant: a build tool, für Java\n"),
    ]


def test_fortunes_are_separated_by_lines_of_a_percent_sign() -> None:
    files = {"b": b"one 100%\nof it\n%\n\ttwo\n%\n", "a": b"three\n"}
    found = [saying for saying in formats.fortunes(files) if saying[1]]
    assert found == [("a/1", "three"), ("b/1", "one 100%\nof it"), ("b/2", "\ttwo")]


def test_the_jargon_file_has_a_document_an_entry() -> None:
    text = "Preface\n\n   : no entry\n\n   :hack:\n   1. n. A quick job.\n\n   :hack: v.\n\n   :TLA: /T-L-A/ n.  \n"
    assert list(formats.jargon({"jargon.txt.gz": gzip.compress(text.encode())})) == [
        ("introduction", "Preface\n\n   : no entry"),
        ("hack", ":hack:\n   1. n. A quick job."),
        ("hack (2)", ":hack: v."),
        ("TLA", ":TLA: /T-L-A/ n."),
    ]


def test_a_book_is_cut_into_chapters() -> None:
    lines = [
        "EMMA",
        "",
        "VOLUME I",
        "",
        "CHAPTER I",
        "",
        "a",
        "chapter 3 of it",
        "",
        "VOLUME II",
        "",
        "Chapter 2",
        "b",
        "FINIS",
    ]
    assert list(formats.chapters("emma", lines)) == [
        ("emma/1", "EMMA\n\nVOLUME I\n\nCHAPTER I\n\na\nchapter 3 of it"),
        ("emma/2", "VOLUME II\n\nChapter 2\nb\nFINIS"),
    ]
    assert list(formats.chapters("notes", ["no", "headings"])) == [("notes/1", "no\nheadings")]


def r_strings(values: list[str], *, attributes: bytes = b"") -> bytes:
    flags = 16 | 0x200 * bool(attributes)
    chars = [struct.pack(">Ii", 0x40009, len(value.encode())) + value.encode() for value in values]
    return struct.pack(">II", flags, len(values)) + b"".join(chars) + attributes


def r_names(names: list[str], symbol: bytes) -> bytes:
    return struct.pack(">I", 0x402) + symbol + r_strings(names) + struct.pack(">I", 254)


def r_list(items: list[bytes], names: bytes) -> bytes:
    return struct.pack(">II", 0x213, len(items)) + b"".join(items) + names


def r_package(variables: dict[str, bytes], *, version: int = 3) -> tuple[bytes, bytes]:
    """A lazy-load database: .rdx and .rdb."""
    header = b"X\n" + struct.pack(">III", version, 0x040201, 0x030500)
    header += struct.pack(">I", 5) + b"UTF-8" if version == 3 else b""
    store, spans = b"", []
    for value in variables.values():
        content = header + value
        block = struct.pack(">I", len(content)) + zlib.compress(content)
        spans.append(struct.pack(">IIii", 13, 2, len(store), len(block)))
        store += block
    names_symbol = struct.pack(">I", 1) + struct.pack(">Ii", 0x40009, 5) + b"names"
    again = struct.pack(">I", 0x1FF)  # the first symbol that was read
    of_variables = r_names(list(variables), names_symbol)
    compressed = struct.pack(">IIi", 10, 1, 1)
    fields = [r_list(spans, of_variables), r_list([], r_names([], again)), compressed]
    index = r_list(fields, r_names(["variables", "references", "compressed"], again))
    return gzip.compress(header + index), store


@pytest.mark.parametrize("version", [2, 3])
def test_character_vectors_of_an_r_package(version: int) -> None:
    numbers = struct.pack(">IIi", 13, 1, 7)
    comment = r_names(["of a vector"], struct.pack(">I", 1) + struct.pack(">Ii", 0x40009, 7) + b"comment")
    variables = {
        "emma": r_strings(["EMMA", "", "naïve"]),
        "year": numbers,
        "lady": r_strings(["Susan"], attributes=comment),
    }
    assert vectors(*r_package(variables, version=version)) == {"emma": ["EMMA", "", "naïve"], "lady": ["Susan"]}
    with pytest.raises(ValueError, match="type 14 are not read"):
        vectors(*r_package({"real": struct.pack(">IId", 14, 1, 7.0)}, version=version))


def bible(books: list[list[str]]) -> dict[str, bytes]:
    """A testament in SWORD's zText form, after an empty block and with verses that have no text."""
    blocks, verses, content = struct.pack("<III", 0, 0, 0), struct.pack("<IIH", 0, 0, 0) * 2, b""
    for number, book in enumerate(books, 1):
        text = b"".join(verse.encode() for verse in book)
        packed, at = zlib.compress(text), 0
        blocks += struct.pack("<III", len(content), len(packed), len(text))
        for verse in book:
            verses += struct.pack("<IIH", number, at, len(verse.encode()))
            at += len(verse.encode())
        content += packed
    return {"ot.bzs": blocks, "ot.bzv": verses, "ot.bzz": content}


def test_a_bible_has_a_document_a_book() -> None:
    god = (
        'In the <w lemma="strong:H1">beginning</w>, <divineName>God</divineName><note>Or, gods</note> created&amp;<lb/>'
    )
    files = bible([[god, "", '<title>Two</title>And <q who="G">let</q> there be líght'], ["<p>Exodus</p>"]])
    files |= {f"n{name[1:]}": content for name, content in bible([["Matthew"]]).items()}
    assert list(formats.ztext(files)) == [
        ("ot/0", "In the beginning, God created&\nTwo And let there be líght"),
        ("ot/1", "Exodus"),
        ("nt/0", "Matthew"),
    ]
    assert strip_osis("a<chapter n='1'/>\n  b") == "a b"


# The whole recipe, from a mirror that is a folder


needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None, reason="no apt")


def package(mirror: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """Builds a .deb into the mirror, and lists it."""
    tree = mirror / "tree" / name
    (tree / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: nobody <n@example.org>\n"
    (tree / "DEBIAN" / "control").write_text(f"{control}Description: a test\n")
    for path, content in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    deb = mirror / f"{name}_{version}_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", str(tree), str(deb)], check=True, capture_output=True)
    content = deb.read_bytes()
    said = f"Filename: ./{deb.name}\nSize: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n"
    with open(mirror / "Packages", "a") as file:
        file.write(f"{control}{said}Description: a test\n\n")
    return deb


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is apt's only mirror."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    (folder / "Packages").touch()
    (folder / "sources.list").write_text(f"deb [trusted=yes] file:{folder} ./\n")
    (folder / "apt.conf").write_text(f'Dir::Etc::sourcelist "{folder}/sources.list";\nDir::Etc::sourceparts "-";\n')
    monkeypatch.setenv("APT_CONFIG", str(folder / "apt.conf"))
    return folder


def kernel(version: str) -> dict[str, bytes]:
    doc = f"usr/share/doc/linux-doc-{version}"
    return {
        f"{doc}/html/_sources/process/howto.rst.txt": f"kernel {version}\n{LONG}".encode(),
        f"{doc}/html/process/howto.html": f'<div role="main"><p>page {version}</p>{LONG}<footer>'.encode(),
        f"{doc}/Documentation/process/howto.rst.gz": gzip.compress(f"tree {version}\n{LONG}".encode(), mtime=0),
        f"{doc}/html/_static/no.rst.txt": b"no" * 200,
    }


def records(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_bytes().splitlines()]


@needs_apt
def test_a_recipe_takes_what_a_mirror_has_and_goes_on_later(mirror: Path, tmp_path: Path) -> None:
    index, store = r_package({"emma": r_strings(["EMMA", "", "CHAPTER I", "", LONG, "\0", "CHAPTER II", LONG])})
    where = "usr/lib/R/site-library/janeaustenr/data/Rdata"
    deb = package(mirror, "r-cran-janeaustenr", "1.0.0-1", {f"{where}.rdx": index, f"{where}.rdb": store})
    for version in ("6.9", "6.10", "6.1"):
        package(mirror, f"linux-doc-{version}", f"{version}.7-2", kernel(version))
    package(
        mirror,
        "fortunes",
        "1:2-3",
        {"usr/share/games/fortunes/art": b"short\n%\n", "usr/share/games/fortunes/a.dat": b""},
    )
    package(mirror, "perl-doc", "5", {}).unlink()
    lines, folder = [], tmp_path / "corpus"
    made = run("debian", folder, lines.append)

    assert records(folder, "austen") == [
        {"text": f"EMMA\n\nCHAPTER I\n\n{LONG.strip()}\n", "source": "austen", "name": "emma/1", "priority": 1},
        {"text": f"CHAPTER II\n{LONG.strip()}\n", "source": "austen", "name": "emma/2", "priority": 1},
    ]
    texts = {
        name: records(folder, name)[0]["text"].split("\n")[0] for name in ("kernel", "kernel_old", "kernel_tree_old")
    }
    assert texts == {"kernel": "kernel 6.10", "kernel_old": "kernel 6.9", "kernel_tree_old": "tree 6.9"}
    assert [record["name"] for record in records(folder, "kernel_pages_old")] == ["process/howto.html"]
    austen, *_ = recipe.read_manifest(folder)
    assert (austen.package, austen.version, austen.documents) == ("r-cran-janeaustenr", "1.0.0-1", 2)
    assert austen.package_sha256 == hashlib.sha256(deb.read_bytes()).hexdigest()
    assert austen.bytes == sum(len(record["text"].encode()) for record in records(folder, "austen"))
    assert any(austen.package_sha256 in line for line in lines)
    assert [source.name for source in made.written] == [
        "austen", "kernel", "kernel_old", "kernel_tree", "kernel_tree_old", "kernel_pages_old"
    ]  # fmt: skip
    assert made.lacking["wordnet"] == "they have no package dict-wn"
    assert made.lacking["perl"].startswith("perl-doc 5 cannot be downloaded: E: ")
    assert made.lacking["fortunes"] == "fortunes 1:2-3 is not laid out as expected: no documents are found in it"
    assert {*made.lacking, *(source.name for source in made.written)} == {source.name for source in DEBIAN}

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not [name for name in before if not name.endswith(".jsonl") and name != "manifest.json"]
    assert run("austen", folder, lines.append).lacking == {} and lines[-1].endswith(
        "complete: every file is as it was written"
    )
    (folder / "kernel.jsonl").write_bytes(before["kernel.jsonl"][:-9])
    package(
        mirror, "dict-wn", "1", {f"usr/share/dictd/wn.{k[2:]}": v for k, v in dictionary([(["ant"], LONG)]).items()}
    )
    again = run("debian", folder, lines.append)
    assert "wordnet" not in again.lacking and [record["name"] for record in records(folder, "wordnet")] == ["ant"]
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }
    assert sum("SHA-256" in line for line in lines) == 4 + 3  # then the kernel, the dictionary, and fortunes in vain


@needs_apt
def test_what_cannot_be_had_is_refused_in_a_sentence(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no package of the recipe can be had .*: they have no package r-cran-jane"):
        run("austen", tmp_path / "corpus", lambda line: None)
    deb = package(mirror, "r-cran-janeaustenr", "1", {"usr/lib/R/site-library/janeaustenr/data/Rdata.rdx": b"\x1f\x8b"})
    with pytest.raises(ValueError, match=r"janeaustenr 1 is not laid out as expected: (error|KeyError)"):
        run("austen", tmp_path / "corpus", lambda line: None)
    deb.write_bytes(deb.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"janeaustenr 1 cannot be downloaded: .*Hash Sum mismatch"):
        run("austen", tmp_path / "corpus", lambda line: None)
    assert list((tmp_path / "corpus").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file cannot be written: File exists"):
        run("austen", tmp_path / "file", lambda line: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no apt-get here, and this recipe takes Debian packages apart"):
        run("austen", tmp_path / "corpus", lambda line: None)


@needs_apt
def test_a_corpus_is_got_and_listed(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["main.py", "data", "get", "austen", "--out", "a/b"]
    assert main.main(words) == 65
    assert "error: no package of the recipe can be had" in capsys.readouterr().err
    index, store = r_package({"emma": r_strings(["CHAPTER I", LONG])})
    where = "usr/lib/R/site-library/janeaustenr/data/Rdata"
    package(mirror, "r-cran-janeaustenr", "1.0.0-1", {f"{where}.rdx": index, f"{where}.rdb": store})
    assert main.main(words) == 0
    out = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "1 austen 1 0.0 r-cran-janeaustenr 1.0.0-1 public domain (packaging: MIT)" in out
    assert out[-1] == "to train on it: python main.py --config FILE data=TextFiles data.paths=a/b"


def test_get_imports_no_jax() -> None:
    program = "import sys, main; print(main.main(['main.py', 'data', 'get', 'austin']), 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "64 False\n"


@needs_apt
@pytest.mark.slow
def test_austen_from_a_real_mirror(tmp_path: Path) -> None:
    made = run("austen", tmp_path, lambda line: None)
    books = {record["name"].split("/")[0] for record in records(tmp_path, "austen")}
    assert books == {"emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility"}
    assert (made.written[0].documents, made.written[0].bytes) == (269, 4_023_915)
    assert "\n\nIt is a truth universally acknowledged" in next(
        record["text"] for record in records(tmp_path, "austen") if record["name"] == "prideprejudice/1"
    )
