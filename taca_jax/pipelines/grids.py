"""Grids of labelled pictures, to look at."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8
_MIN_SIDE = 160  # narrower pictures are enlarged by a whole factor


def caption_grid(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    columns: int | None = None,
    headings: Sequence[str] = (),
) -> Image.Image:
    """Arranges pictures of one size in rows, with captions below them and headings above columns.

    Raises ValueError unless there is at least one picture, and one caption for each.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions; give one each")
    font = ImageFont.load_default(size=13)
    scale = max(1, -(-_MIN_SIDE // pictures[0].width))
    width, height = (side * scale for side in pictures[0].size)
    columns = columns or min(len(pictures), 4)
    rows = -(-len(pictures) // columns)
    wrapped = [_wrap(caption, font, width) for caption in captions]
    line = 16
    text_height = line * max(len(lines) for lines in wrapped) + 4
    top = line + _MARGIN if headings else _MARGIN
    cell_width, cell_height = width + _MARGIN, height + text_height + _MARGIN
    grid = Image.new("RGB", (columns * cell_width + _MARGIN, top + rows * cell_height), "white")
    pen = ImageDraw.Draw(grid)
    for column, heading in enumerate(headings):
        pen.text((_MARGIN + column * cell_width, 4), heading, fill="black", font=font)
    for i, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        x = _MARGIN + i % columns * cell_width
        y = top + i // columns * cell_height
        resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        grid.paste(picture.convert("RGB").resize((width, height), resample), (x, y))
        for n, text in enumerate(lines):
            pen.text((x, y + height + 2 + n * line), text, fill="black", font=font)
    return grid


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
