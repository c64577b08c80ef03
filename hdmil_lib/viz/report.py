"""A report about a cohort of slides in one page that opens offline, with a contact sheet per slide."""

import hashlib
import html
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from hdmil_lib.bags import bag_info
from hdmil_lib.errors import BagError
from hdmil_lib.slides.listing import SlideFile, Source, list_slides
from hdmil_lib.slides.presets import describe, tissue_settings
from hdmil_lib.slides.quality import SlideQuality, slide_quality
from hdmil_lib.slides.reader import Slide
from hdmil_lib.slides.tissue import TissueSettings
from hdmil_lib.storage import readable, write_table, write_whole
from hdmil_lib.version import __version__
from hdmil_lib.viz.quality import contact_sheet

if TYPE_CHECKING:
    import pandas as pd

PICTURES = "sheets"
"""Folder of the contact sheets, beside the page."""

COLUMNS = (
    *("slide_id", "path", "width", "height", "format", "mpp", "mpp_source", "n_tiles", "tissue_share"),
    *("tissue_mm2", "bag_tiles", "picture", "warnings", "error"),
)

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #2b2f36; margin: 2rem auto;
  max-width: 88rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p.sub { color: #666c75; margin-top: 0; } a { color: #0072b2; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #e3e6ea; text-align: left; vertical-align: top; }
th { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #8a8f98; font-weight: 600; }
td.n, th.n { text-align: right; white-space: nowrap; } td.name { overflow-wrap: anywhere; min-width: 9rem; }
ul { margin: 0; padding-left: 1.1rem; }
tr.failed td { background: #fbe9e0; } tr.warned td { background: #fff8e0; }
.error { color: #a33c00; } img { max-width: 100%; height: auto; border: 1px solid #e3e6ea; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.tiles div { border: 1px solid #d5d9de; border-radius: .4rem; padding: .5rem 1rem; }
.tiles b { display: block; font-size: 1.4rem; }
@media print { th { position: static; } section { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class _Row:
    """What the report says about one slide."""

    file: SlideFile
    quality: SlideQuality | None = None
    bag_tiles: int | None = None
    picture: str = ""
    warnings: tuple[str, ...] = ()
    error: str = ""

    def values(self) -> tuple[object, ...]:
        """The values of `COLUMNS`."""
        name, path = readable(self.file.slide_id), readable(str(self.file.path))
        q = self.quality
        about: tuple[object, ...] = (None, None, "", None, "", 0, None, None)
        if q is not None:
            about = (*q.dimensions, q.vendor, q.scale.mpp[0], q.scale.source)
            about += (q.n_tiles, round(q.tissue_share, 4), round(q.tissue_mm2, 3))
        return name, path, *about, self.bag_tiles, self.picture, "; ".join(self.warnings), self.error


def write_report(
    slides: Source | Sequence[Source],
    out: str | Path,
    *,
    tissue: TissueSettings | str | None = None,
    mpp: float | tuple[float, float] | None = None,
    bags: str | Path | None = None,
    progress: bool = True,
) -> "pd.DataFrame":
    """Look at every slide and write `index.html`, `slides.csv` and a contact sheet per slide.

    A slide that cannot be read, for whatever reason, is a row of the report and does not stop the others.

    Args:
        slides: Slides, as `extract` takes them.
        out: Folder of the report; it is created.
        tissue: Settings of the tissue mask, or the name of a preset; None takes the defaults.
        mpp: Micrometers per level-0 pixel, as `Slide` takes it.
        bags: Folder that `extract` wrote, whose bags are compared with what the slides show.
        progress: Whether a bar is shown.

    Returns:
        One row per slide: slide_id, path, width and height in pixels, format, mpp (of level 0, along x),
            mpp_source, n_tiles, tissue_share (0 to 1), tissue_mm2, bag_tiles, picture (relative to `out`),
            warnings and error, as in `slides.csv`.

    Raises:
        SlideError: No slide is named, or a folder or table names none.
        HDMILError: There is no such preset, or a setting is out of its range.
    """
    import pandas as pd

    settings, files, out = tissue_settings(tissue), list_slides(slides), Path(out)
    rows = []
    for file in tqdm(files, desc="slides", unit="slide", disable=not progress):
        try:
            row = _look(file, settings, mpp, out, f"{PICTURES}/{_slug(file)}.png")
        except Exception as error:  # any error concerns this slide only
            row = _Row(file, error=readable(str(error)) or type(error).__name__)
        rows.append(row if bags is None else _with_bag(row, Path(bags)))
    table = pd.DataFrame([row.values() for row in rows], columns=list(COLUMNS))
    table = table.astype({"width": "Int64", "height": "Int64", "bag_tiles": "Int64"})
    write_table(out / "slides.csv", table)
    page = _page(rows, settings, with_bags=bags is not None)
    write_whole(out / "index.html", lambda part: part.write_text(page, encoding="utf-8", errors="replace"))
    return table


def save_picture(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_whole(path, lambda part: figure.savefig(part, dpi=dpi, bbox_inches=None))
    plt.close(figure)


def _look(
    file: SlideFile,
    settings: TissueSettings,
    mpp: float | tuple[float, float] | None,
    out: Path,
    picture: str,
) -> _Row:
    with Slide(file.path, file.scale(mpp), name=readable(file.slide_id)) as slide:
        quality = slide_quality(slide, settings)
    save_picture(contact_sheet(quality), out / picture)
    warnings = [text for text in quality.warnings if text != quality.error]
    return _Row(file, quality, None, picture, tuple(warnings), quality.error)


def _with_bag(row: _Row, bags: Path) -> _Row:
    """The row with what the slide's bag says."""
    path = bags / f"{row.file.slide_id}.h5"
    n_tiles, warnings = None, list(row.warnings)
    try:
        info = bag_info(path)
        n_tiles = int(info["n_tiles"])
        if row.quality is not None and n_tiles != row.quality.n_tiles:
            made_with = info.get("tissue", "default")
            warnings.append(
                f"its bag has {n_tiles:,} tiles (tissue {made_with}), this report finds "
                f"{row.quality.n_tiles:,}"
            )
    except BagError as error:
        warnings.append(str(error) if path.exists() else "it has no bag")
    return _Row(row.file, row.quality, n_tiles, row.picture, tuple(map(readable, warnings)), row.error)


def _slug(file: SlideFile) -> str:
    """A name of its own for each slide, in letters that any file system and address allows."""
    letters = re.sub(r"[^A-Za-z0-9._-]+", "_", readable(file.slide_id))[:80]
    return f"{letters}-{hashlib.sha256(readable(str(file.path)).encode()).hexdigest()[:8]}"


def _page(rows: Sequence[_Row], settings: TissueSettings, *, with_bags: bool) -> str:
    """The page of a report."""
    n_failed = sum(bool(row.error) for row in rows)
    n_warned = sum(bool(row.warnings) and not row.error for row in rows)
    seen = [row.quality for row in rows if row.quality is not None]
    scales = Counter(f"{q.scale.mpp[0]:.2f} µm/px" for q in seen)
    facts = {
        "slides": f"{len(rows):,}",
        "tiles": f"{sum(q.n_tiles for q in seen):,}",
        "of tissue": f"{sum(q.tissue_mm2 for q in seen):,.1f} mm²",
        "with warnings": f"{n_warned:,}",
        "failed": f"{n_failed:,}",
        "scales": ", ".join(f"{scale} ({n})" for scale, n in scales.most_common(4)) or "-",
    }
    tiles = "".join(f"<div><b>{_e(value)}</b>{_e(name)}</div>" for name, value in facts.items())
    head = ["slide", "size, px", "format", "µm/px", "tiles", "tissue", "mm²", *["bag"] * with_bags, "notes"]
    numbers = {"size, px", "tiles", "tissue", "mm²", "bag"}
    header = "".join(f"<th{' class=n' * (name in numbers)}>{_e(name)}</th>" for name in head)
    body = "\n".join(_table_row(i, row, with_bags=with_bags) for i, row in enumerate(rows))
    sections = "\n".join(_section(i, row) for i, row in enumerate(rows))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Slides: {len(rows)}</title>
<meta http-equiv="Content-Security-Policy" content="script-src 'none'">
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>Slides before extraction</h1>
<p class="sub">hdmil {_e(__version__)}, {date.today().isoformat()}; tissue settings: {_e(describe(settings))},
tiles of 128 µm with {settings.min_tissue:.0%} tissue. The table is also in
<a href="slides.csv">slides.csv</a>.</p>
<div class="tiles">{tiles}</div>
<table><thead><tr>{header}</tr></thead><tbody>
{body}
</tbody></table>
{sections}
</body></html>
"""


def _table_row(i: int, row: _Row, *, with_bags: bool) -> str:
    """The row of a slide in the table."""
    q = row.quality
    cells = [("name", f'<a href="#s{i}">{_e(readable(row.file.slide_id))}</a>')]
    if q is None:
        cells += [("n", "-"), ("", "-"), ("", "-"), ("n", "-"), ("n", "-"), ("n", "-")]
    else:
        cells += [
            ("n", f"{q.dimensions[0]:,} × {q.dimensions[1]:,}"),
            ("", _e(q.vendor)),
            ("", f"{q.scale.mpp[0]:.4g}<br><small>{_e(q.scale.source)}</small>"),
            ("n", f"{q.n_tiles:,}"),
            ("n", f"{q.tissue_share:.1%}"),
            ("n", f"{q.tissue_mm2:,.2f}"),
        ]
    if with_bags:
        cells.append(("n", "-" if row.bag_tiles is None else f"{row.bag_tiles:,}"))
    cells.append(("", _notes(row)))
    kind = "failed" if row.error else "warned" if row.warnings else ""
    return f'<tr class="{kind}">' + "".join(f'<td class="{c}">{text}</td>' for c, text in cells) + "</tr>"


def _notes(row: _Row) -> str:
    """The error and the warnings of a slide as a list."""
    notes = [f'<li class="error">{_e(row.error)}</li>'] if row.error else []
    notes += [f"<li>{_e(warning)}</li>" for warning in row.warnings]
    return f"<ul>{''.join(notes)}</ul>" if notes else ""


def _section(i: int, row: _Row) -> str:
    """The contact sheet of a slide."""
    name = _e(readable(row.file.slide_id))
    path = f'<p class="sub">{_e(readable(str(row.file.path)))}</p>'
    if not row.picture:
        return f'<section id="s{i}"><h2>{name}</h2>{path}{_notes(row)}</section>'
    image = f'<img loading="lazy" src="{quote(row.picture)}" alt="Contact sheet of {name}">'
    return f'<section id="s{i}"><h2>{name}</h2>{path}{image}</section>'


def _e(text: object) -> str:
    """Text that a browser shows as it is, never as markup."""
    return html.escape(str(text).encode("utf-8", "replace").decode())
