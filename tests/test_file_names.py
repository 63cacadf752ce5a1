import random
import re

from ldm.file_names import slug, unused_path


def test_slugs_of_hostile_texts():
    assert slug("A cat, on  a RED card!") == "a-cat-on-a-red-card"
    assert slug("Crème Brûlée №5") == "creme-brulee-no5"
    draw = random.Random(0)
    texts = [
        "",
        " ",
        "..",
        "../../etc/passwd",
        "CON",
        "-rf /",
        "a" * 1000,
        "-" * 100,
        "日本語",
        "\0",
        "\ud800x",
        "a\nb",
    ]
    texts += ["İ", "ﬃ", "\u202etxt.exe", "x" * 59 + "-y", "%2e%2e", "~", "a/b\\c", "🐈" * 300, "é" * 200]
    texts += ["".join(chr(draw.randrange(0x3000)) for _ in range(draw.randrange(80))) for _ in range(2000)]
    for text in texts:
        short = slug(text)
        assert re.fullmatch(r"[a-z0-9-]{1,60}", short) and short.strip("-") == short
    assert [slug(t) for t in ("", "..", "日本語", "🐈")] == ["image"] * 4


def test_unused_path_counts_on(tmp_path):
    assert unused_path(tmp_path, "a", ".png") == tmp_path / "a.png"
    (tmp_path / "a.png").touch()
    (tmp_path / "a-2.png").mkdir()
    (tmp_path / "a-3.png").symlink_to("nowhere")  # taken, though it leads nowhere
    assert unused_path(str(tmp_path), "a", ".png") == tmp_path / "a-4.png"
    assert unused_path(tmp_path, "b", "") == tmp_path / "b"
