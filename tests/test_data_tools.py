"""The verb data: a corpus that is got, and numbers and plots of what was prepared."""

import html.parser
from pathlib import Path

import pytest

import main
from data.statistics import Bucket, Statistics
from mtx.data_tools import page as pages
from mtx.data_tools.stats import histogram, table

ROOT = Path(__file__).resolve().parent.parent


def statistics(*histogram: tuple[int, int, int], text_bytes: int | None = None) -> Statistics:
    buckets = tuple(Bucket(*bucket) for bucket in histogram)
    documents, tokens = sum(b.documents for b in buckets), sum(b.tokens for b in buckets)
    return Statistics(documents=documents, tokens=tokens, bytes=text_bytes, median=12.5, longest=99, histogram=buckets)


BLEND = {
    "wiki": {
        "train": statistics((0, 1, 0), (1, 0, 0), (2, 3, 7), text_bytes=9),
        "validation": statistics((2, 1, 3), (4, 4, 20), text_bytes=54),
    },
    "books & <x>": {"train": statistics((1024, 2, 3000))},
}


def test_numbers_are_a_table() -> None:
    assert [" ".join(line.split()) for line in table(BLEND)] == [
        "source split documents tokens bytes of text bytes/token tokens/document: mean median longest",
        "wiki train 4 7 9 3.000 1.8 12 99",
        "validation 5 23 54 3.000 4.6 12 99",
        "books & <x> train 2 3,000 unknown unknown 1,500.0 12 99",
    ]
    lines = list(table(BLEND))
    assert len({len(line) for line in lines}) == 1
    assert all(line[13:18] in ("split", "train", "valid") for line in lines)
    assert next(table({"": BLEND["wiki"]})).startswith("split ")


def test_lengths_are_a_table_with_bars() -> None:
    assert [" ".join(line.split()) for line in histogram("wiki", BLEND["wiki"])] == [
        "wiki: documents by tokens",
        "tokens train validation share",
        "0 1 0 11.1% ##########",
        "1 0 0 0.0%",
        "2 to 3 3 1 44.4% ########################################",
        "4 to 7 0 4 44.4% ########################################",
    ]
    assert next(histogram("", {})) == "documents by tokens"


class Page(html.parser.HTMLParser):
    """Checks that elements nest, and collects what they say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.said: list[tuple[str, str]] = []
        self.bars: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "rect":
            self.bars.append(dict(attrs))
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "rect")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.said.append((self.open[-1], data))


def test_the_page_has_the_numbers_and_bars_of_their_heights() -> None:
    found = Page(pages.page("x & <y>", BLEND))
    assert [text for tag, text in found.said if tag in ("h1", "h2")] == ["x & <y>", "wiki", "books & <x>"]
    cells = [text for tag, text in found.said if tag == "td"]
    assert cells[:9] == ["wiki", "train", "4", "7", "9", "3.000", "1.8", "12", "99"]
    titles = [text for tag, text in found.said if tag == "title"]
    assert "train, 2 to 3 tokens: 75.00 %" in titles and "train, 1,024 to 2,047 tokens: 100.00 %" in titles
    heights = {text: float(bar["height"] or 0) for text, bar in zip(titles[1:], found.bars, strict=True)}
    high = pages.HEIGHT - pages.TOP - pages.BOTTOM
    assert heights["validation, 4 to 7 tokens: 80.00 %"] == pytest.approx(high)  # the axis ends there
    assert heights["train, 2 to 3 tokens: 75.00 %"] == pytest.approx(high * 75 / 80, abs=0.06)
    assert heights["validation, 4 to 7 tokens: 86.96 %"] == pytest.approx(high * 0.8696, abs=0.06)  # to 100
    feet = [float(bar["y"] or 0) + float(bar["height"] or 0) for bar in found.bars]
    assert feet == pytest.approx([pages.TOP + high] * len(feet), abs=0.11)
    assert "script" not in pages.page("x", BLEND) and "http" not in pages.page("x", BLEND)
    assert pages.plot("empty", {"train": statistics()}, len) == ""


@pytest.mark.parametrize(("number", "said"), [(0, "0"), (512, "512"), (1024, "1k"), (1 << 21, "2M"), (1 << 30, "1G")])
def test_edges_are_short(number: int, said: str) -> None:
    assert pages.short(number) == said


def test_stats_of_prepared_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for number in range(20):
        (tmp_path / "notes" / f"{number}.txt").write_text(f"note {number:<27}" if number % 2 else "short")
    config = ["--config", str(ROOT / "configs" / "own_text.py"), "data.tokenizer=Bytes", "data.split=1,1"]
    words = ["main.py", "data", "stats", *config]
    assert main.main(words) == 65
    assert "has no shards in" in capsys.readouterr().err
    assert main.main(["main.py", "prepare", *config]) == 0
    capsys.readouterr()
    assert main.main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert any(line.split()[:4] == ["32", "to", "63", "5"] for line in out)
    path = Path(out[-1].removeprefix("plots: "))
    assert path.parent.parent == Path("prepared") and Page(path.read_text()).said[0][1].endswith("data=TextFiles")
    shards = f"data=MegatronShards data.train={path.parent}/train data.tokenizer=Bytes".split()
    assert main.main(["main.py", "data", "stats", "--config", str(ROOT / "configs" / "quickstart.py"), *shards]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "plots: prepared/quickstart.html"
    assert main.main([*words, "--html", "deep/er/x.html"]) == 0
    assert Path("deep/er/x.html").read_text() == path.read_text()
    assert main.main([*words, "--html", "notes"]) == 65
    assert "notes cannot be written: Is a directory; name another file: --html FILE." in capsys.readouterr().err
