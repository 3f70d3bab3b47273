"""What the project's HTML pages have in common: their frame, their look, and how text of others gets into them.

A page is one file without scripts: styles and pictures are in it, and it forbids itself to load or run anything.
"""

from __future__ import annotations

import html

_TEXT = 240  # characters
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def shown_text(text: str, limit: int = _TEXT) -> str:
    """Escaped, on one line, not too long; without the characters that would hide or reorder what follows."""
    shown = "".join(character if character.isprintable() else " " for character in text[: limit + 1])
    return html.escape(shown if len(text) <= limit else shown[:limit] + "…")


def whole_page(title: str, style: str, body: str) -> str:
    """The page of ``body``, which is markup; ``style`` is added to the common one."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{shown_text(title)}</title><style>{_one_line(_STYLE + style)}</style></head><body><main>\n"
        f"{body}\n</main></body></html>\n"
    )


def _one_line(style: str) -> str:
    return style.strip().replace("\n", "")


_STYLE = """
:root{color-scheme:light}
body{margin:0;background:#f7f7f5;color:#1f2933;font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;margin:0 0 4px;font-weight:650}
h2{font-size:18px;margin:36px 0 10px;font-weight:600}
h3{font-size:15px;margin:20px 0 8px;font-weight:600}
h3 span{font-weight:400;color:#52606d;font-size:13px;margin-left:6px}
p{margin:0 0 14px;color:#52606d;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:12px;margin-top:20px}
.tiles div{background:#fff;border:1px solid #e4e4e0;border-radius:10px;padding:12px 16px}
.tiles b{display:block;font-size:22px;font-weight:650;font-variant-numeric:tabular-nums}
.tiles span{color:#52606d;font-size:13px}
figure{margin:0;background:#fff;border:1px solid #e4e4e0;border-radius:10px;padding:12px 14px}
figcaption{font-weight:600;font-size:13px;margin-bottom:6px}
svg{width:100%;height:auto;display:block}
.scroll{overflow-x:auto;background:#fff;border:1px solid #e4e4e0;border-radius:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 14px;text-align:left;vertical-align:top;border-bottom:1px solid #f0f0ed}
th{font-weight:600;color:#52606d;font-size:13px;background:#fbfbfa}
.n{text-align:right;white-space:nowrap}
tbody tr:last-child td{border-bottom:0}
code{font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
details{margin-top:12px}
summary{cursor:pointer;font-weight:600;padding:6px 0}
"""
