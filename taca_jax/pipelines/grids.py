"""Pictures to look at: small ones enlarged, and several in a grid with captions."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SMALL, SHOWN = 256, 512
"""Pictures with fewer pixels than the first along their longer side are shown with at least the
second."""

_MARGIN = 8
_FONT_SIZE, _LINE = 20, 26


def enlarged(picture: Image.Image) -> Image.Image:
    """The picture, if it is small with each pixel as a square of pixels."""
    longer = max(picture.size)
    if longer >= SMALL:
        return picture
    factor = -(-SHOWN // longer)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def caption_grid(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    columns: int | None = None,
    headings: Sequence[str] = (),
) -> Image.Image:
    """Arranges pictures of one size in rows, small ones enlarged, with captions below them and
    headings above columns.

    Raises ValueError unless there is at least one picture, and one caption for each.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions; give one each")
    font = ImageFont.load_default(size=_FONT_SIZE)
    shown = [enlarged(picture.convert("RGB")) for picture in pictures]
    width, height = shown[0].size
    columns = columns or min(len(pictures), 4)
    rows = -(-len(pictures) // columns)
    wrapped = [_wrap(caption, font, width) for caption in captions]
    text_height = _LINE * max(len(lines) for lines in wrapped) + 4
    top = _LINE + _MARGIN if headings else _MARGIN
    cell_width, cell_height = width + _MARGIN, height + text_height + _MARGIN
    grid = Image.new("RGB", (columns * cell_width + _MARGIN, top + rows * cell_height), "white")
    pen = ImageDraw.Draw(grid)
    for column, heading in enumerate(headings):
        pen.text((_MARGIN + column * cell_width, 4), heading, fill="black", font=font)
    for i, (picture, lines) in enumerate(zip(shown, wrapped, strict=True)):
        x = _MARGIN + i % columns * cell_width
        y = top + i // columns * cell_height
        grid.paste(picture, (x, y))
        for n, text in enumerate(lines):
            pen.text((x, y + height + 2 + n * _LINE), text, fill="black", font=font)
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
