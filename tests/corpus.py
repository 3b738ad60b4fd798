"""Bad and odd image files, made here, each with its expected outcome written down."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

Color = tuple[int, int, int]

R, G, B, W, K = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
HEIGHT, WIDTH = 32, 48


@dataclass(frozen=True)
class Decoded:
    """Expected: this size, and these colours at top left, top right, bottom left, bottom right."""

    corners: tuple[Color, Color, Color, Color]
    size: tuple[int, int] = (HEIGHT, WIDTH)
    within: int = 0  # of every channel; lossy formats are not exact

    def __str__(self) -> str:
        colors = " ".join("#{:02x}{:02x}{:02x}".format(*color) for color in self.corners)
        return f"{self.size[0]} x {self.size[1]}, corners {colors}" + (
            f" +- {self.within}" * bool(self.within)
        )


@dataclass(frozen=True)
class Refused:
    """Expected: an error that matches; `truncated` says what `allow_truncated` makes of the file instead."""

    match: str
    truncated: Decoded | None = None

    def __str__(self) -> str:
        return f"refused: {self.match}" + (
            f"; with --allow-truncated {self.truncated}" if self.truncated else ""
        )


@dataclass(frozen=True)
class Case:
    """One file of the corpus."""

    name: str
    make: Callable[[], bytes]
    expected: Decoded | Refused


def quarters() -> Image.Image:
    """Red and green above blue and white."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:16, :24], pixels[:16, 24:], pixels[16:, :24], pixels[16:, 24:] = R, G, B, W
    return Image.fromarray(pixels)


def noise() -> Image.Image:
    """Does not compress, so that half a file is half a picture."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def ramp(kind: type, low: float, high: float) -> Image.Image:
    """Grey from `low` on the left to `high` on the right."""
    row = np.linspace(low, high, WIDTH).astype(kind)
    return Image.fromarray(np.repeat(row[None], HEIGHT, axis=0))


def grey(left: int, right: int) -> tuple[Color, Color, Color, Color]:
    return ((left,) * 3, (right,) * 3, (left,) * 3, (right,) * 3)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, depth: int, color: int, row: bytes, extra: bytes = b"") -> bytes:
    """A PNG of equal rows, of a kind that Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")


def with_orientation(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    return encoded(quarters(), kind, exif=exif, **lossless)


def translucent(mode: str = "RGBA") -> Image.Image:
    picture = quarters().convert("RGBA")
    picture.putalpha(64)
    return picture.convert(mode)


def frames() -> list[Image.Image]:
    return [Image.new("RGB", (WIDTH, HEIGHT), color) for color in (B, W)]


def animated(kind: str) -> bytes:
    return encoded(
        quarters(),
        kind,
        save_all=True,
        append_images=frames(),
        **({"lossless": True} if kind == "WEBP" else {}),
    )


def palette_with_transparency() -> bytes:
    picture = quarters().quantize(4)
    return encoded(picture, "PNG", transparency=bytes([0, 128, 255, 30]))


def flipped(data: bytes, marker: bytes, offset: int) -> bytes:
    """The file with one byte changed, so many bytes behind a marker."""
    place = data.index(marker) + offset
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def ycck_jpeg() -> bytes:
    """Pillow writes CMYK with Adobe's transform 0; a file of one colour, relabelled, is YCCK."""
    data = encoded(Image.new("CMYK", (WIDTH, HEIGHT), (127, 127, 127, 0)), "JPEG", quality=95)
    place = data.index(b"Adobe") + 11
    return data[:place] + b"\x02" + data[place + 1 :]


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def bomb_png(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def text_bomb_png() -> bytes:
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 << 20), 9))
    return raw_png(WIDTH, HEIGHT, 8, 2, bytes(R) * WIDTH, text)


def with_bad_exif() -> bytes:
    return encoded(
        quarters(), "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff" + b"\xff" * 40
    )


GREY = (128, 128, 128)
NOISE = ((95, 130, 194), (51, 157, 138), (198, 102, 2), (227, 37, 72))  # the corners of `noise()`
QUARTERS = Decoded((R, G, B, W))
LOSSY = Decoded((R, G, B, W), within=8)
GREY_QUARTERS = Decoded(((76,) * 3, (150,) * 3, (29,) * 3, W), within=1)
NOT_AN_IMAGE = "not an image that can be read"

UPRIGHT = {
    1: Decoded((R, G, B, W)),
    2: Decoded((G, R, W, B)),
    3: Decoded((W, B, G, R)),
    4: Decoded((B, W, R, G)),
    5: Decoded((R, B, G, W), (WIDTH, HEIGHT)),
    6: Decoded((B, R, W, G), (WIDTH, HEIGHT)),
    7: Decoded((W, G, B, R), (WIDTH, HEIGHT)),
    8: Decoded((G, W, R, B), (WIDTH, HEIGHT)),
}

CASES = [
    # kinds of file
    Case("plain.png", lambda: encoded(quarters(), "PNG"), QUARTERS),
    Case("plain.jpg", lambda: encoded(quarters(), "JPEG", quality=95, subsampling=0), LOSSY),
    Case(
        "progressive.jpg",
        lambda: encoded(quarters(), "JPEG", quality=95, subsampling=0, progressive=True),
        LOSSY,
    ),
    Case("plain.bmp", lambda: encoded(quarters(), "BMP"), QUARTERS),
    Case("plain.gif", lambda: encoded(quarters(), "GIF"), QUARTERS),
    Case("plain.tif", lambda: encoded(quarters(), "TIFF"), QUARTERS),
    Case("lzw.tiff", lambda: encoded(quarters(), "TIFF", compression="tiff_lzw"), QUARTERS),
    Case("plain.ppm", lambda: encoded(quarters(), "PPM"), QUARTERS),
    Case("lossless.webp", lambda: encoded(quarters(), "WEBP", lossless=True), QUARTERS),
    Case("lossy.webp", lambda: encoded(quarters(), "WEBP", quality=95), Decoded((R, G, B, W), within=12)),
    Case("lossless.jp2", lambda: encoded(quarters(), "JPEG2000"), QUARTERS),
    Case(
        "plain.ico",
        lambda: encoded(quarters().resize((32, 32)), "ICO", sizes=[(32, 32)]),
        Decoded((R, G, B, W), (32, 32)),
    ),
    # modes and depths
    Case("grey.png", lambda: encoded(quarters().convert("L"), "PNG"), GREY_QUARTERS),
    Case(
        "grey.jpg",
        lambda: encoded(quarters().convert("L"), "JPEG", quality=95),
        Decoded(GREY_QUARTERS.corners, within=4),
    ),
    Case(
        "one bit.png",
        lambda: encoded(quarters().convert("1", dither=Image.Dither.NONE), "PNG"),
        Decoded((K, W, K, W)),
    ),
    Case(
        "two bit grey.png",
        lambda: raw_png(WIDTH, HEIGHT, 2, 0, b"\x1b" * (WIDTH // 4)),
        Decoded(grey(0, 255)),
    ),
    Case("grey with alpha.png", lambda: encoded(translucent("LA"), "PNG"), GREY_QUARTERS),
    Case("alpha.png", lambda: encoded(translucent(), "PNG"), QUARTERS),
    Case("alpha.webp", lambda: encoded(translucent(), "WEBP", lossless=True), QUARTERS),
    Case("alpha.tif", lambda: encoded(translucent(), "TIFF"), QUARTERS),
    Case("palette.png", lambda: encoded(quarters().quantize(4), "PNG"), QUARTERS),
    Case("palette with transparency.png", palette_with_transparency, QUARTERS),
    Case("transparent.gif", lambda: encoded(quarters().quantize(4), "GIF", transparency=0), QUARTERS),
    Case("cmyk.tif", lambda: encoded(quarters().convert("CMYK"), "TIFF"), QUARTERS),
    Case(
        "cmyk.jpg",
        lambda: encoded(quarters().convert("CMYK"), "JPEG", quality=95),
        Decoded((R, G, B, W), within=8),
    ),
    Case("ycck.jpg", ycck_jpeg, Decoded(grey(128, 128), within=2)),
    Case("ycbcr.tif", lambda: encoded(quarters().convert("YCbCr"), "TIFF"), Decoded((R, G, B, W), within=2)),
    Case(
        "lab.tif",
        lambda: encoded(Image.new("LAB", (WIDTH, HEIGHT), (128, 128, 128)), "TIFF"),
        Decoded(grey(119, 119), within=2),
    ),
    Case("16 bit grey.png", lambda: encoded(ramp(np.uint16, 0, 65535), "PNG"), Decoded(grey(0, 255))),
    Case("16 bit dark grey.png", lambda: encoded(ramp(np.uint16, 0, 1023), "PNG"), Decoded(grey(0, 3))),
    Case("16 bit grey.tif", lambda: encoded(ramp(np.uint16, 256, 32768), "TIFF"), Decoded(grey(1, 128))),
    Case(
        "16 bit grey.pgm",
        lambda: b"P5 48 32 65535\n" + struct.pack(">H", 32768) * WIDTH * HEIGHT,
        Decoded(grey(128, 128)),
    ),
    Case(
        "16 bit grey with alpha.png",
        lambda: raw_png(WIDTH, HEIGHT, 16, 4, struct.pack(">HH", 32768, 9) * WIDTH),
        Decoded(grey(128, 128)),
    ),
    Case(
        "16 bit colour.png",
        lambda: raw_png(WIDTH, HEIGHT, 16, 2, struct.pack(">3H", 65535, 32768, 255) * WIDTH),
        Decoded(((255, 128, 0),) * 4),
    ),
    Case("float to 1.tif", lambda: encoded(ramp(np.float32, 0, 1), "TIFF"), Decoded(grey(0, 255))),
    Case("float to 255.tif", lambda: encoded(ramp(np.float32, 0, 200), "TIFF"), Decoded(grey(0, 200))),
    Case(
        "float negative.tif",
        lambda: encoded(ramp(np.float32, -1, 1), "TIFF"),
        Refused(r"expected float32 pixels in \[0, 255\].*found -1 to 1"),
    ),
    Case("float nan.tif", lambda: encoded(ramp(np.float32, 0, np.nan), "TIFF"), Refused("found nan to nan")),
    Case("32 bit to 255.tif", lambda: encoded(ramp(np.int32, 0, 255), "TIFF"), Decoded(grey(0, 255))),
    Case(
        "32 bit large.tif",
        lambda: encoded(ramp(np.int32, 0, 70000), "TIFF"),
        Refused("expected int32 pixels.*found 0 to 70000"),
    ),
    Case(
        "icc.png",
        lambda: encoded(
            quarters(), "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        ),
        QUARTERS,
    ),
    Case(
        "icc damaged.jpg",
        lambda: encoded(quarters(), "JPEG", quality=95, subsampling=0, icc_profile=b"no profile"),
        LOSSY,
    ),
    # several frames
    Case("animated.gif", lambda: animated("GIF"), QUARTERS),
    Case("animated.png", lambda: animated("PNG"), QUARTERS),
    Case("animated.webp", lambda: animated("WEBP"), QUARTERS),
    Case("two pages.tif", lambda: animated("TIFF"), QUARTERS),
    # orientation
    *(
        Case(
            f"orientation {n}.jpg",
            lambda n=n: with_orientation("JPEG", n),
            Decoded(UPRIGHT[n].corners, UPRIGHT[n].size, within=8),
        )
        for n in UPRIGHT
    ),
    *(Case(f"orientation {n}.png", lambda n=n: with_orientation("PNG", n), UPRIGHT[n]) for n in (3, 6)),
    Case("orientation 6.tif", lambda: with_orientation("TIFF", 6), UPRIGHT[6]),
    Case("orientation 8.webp", lambda: with_orientation("WEBP", 8), UPRIGHT[8]),
    Case("orientation 0.jpg", lambda: with_orientation("JPEG", 0), LOSSY),
    Case("orientation 99.jpg", lambda: with_orientation("JPEG", 99), LOSSY),
    Case("exif damaged.jpg", with_bad_exif, LOSSY),
    # sizes
    Case("one pixel.png", lambda: encoded(Image.new("RGB", (1, 1), G), "PNG"), Decoded((G,) * 4, (1, 1))),
    Case(
        "one row of 60000.png",
        lambda: encoded(Image.new("RGB", (60000, 1), B), "PNG"),
        Decoded((B,) * 4, (1, 60000)),
    ),
    Case(
        "one column of 60000.png",
        lambda: encoded(Image.new("RGB", (1, 60000), B), "PNG"),
        Decoded((B,) * 4, (60000, 1)),
    ),
    Case(
        "bomb 10000.png",
        lambda: bomb_png(10_000, 10_000),
        Refused(r"expected at most 89478485 pixels \(--max-pixels\), found 100000000 \(10000 x 10000\)"),
    ),
    Case(
        "bomb 60000.png",
        lambda: bomb_png(60_000, 60_000),
        Refused(r"expected at most 89478485 pixels \(--max-pixels\), found 3600000000"),
    ),
    Case(
        "bomb.gif",
        lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + encoded(quarters(), "GIF")[10:],
        Refused("--max-pixels"),
    ),
    Case(
        "bomb.bmp",
        lambda: (b := encoded(quarters(), "BMP"))[:18] + struct.pack("<ii", 40000, 40000) + b[26:],
        Refused("--max-pixels"),
    ),
    Case("bomb in text.png", text_bomb_png, Refused("Decompressed data too large")),
    Case("zero wide.png", lambda: raw_png(0, 1, 8, 2, b""), Refused("found a damaged PNG header")),
    # damage
    Case("empty.png", lambda: b"", Refused("found an empty file")),
    Case("text.png", lambda: b"no image at all\n", Refused(f"{NOT_AN_IMAGE}.*found text")),
    Case("page.jpg", lambda: b"<!DOCTYPE html><html>404</html>", Refused("found HTML")),
    Case(
        "drawing.png",
        lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        Refused("found a vector document"),
    ),
    Case(
        "postscript.png",
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        Refused("found a vector document"),
    ),
    Case("zeros.jpg", lambda: bytes(1000), Refused("begin with 00 00")),
    Case("random.png", lambda: np.random.default_rng(1).bytes(1000), Refused(f"{NOT_AN_IMAGE}.*begin with")),
    Case("jpeg inside.png", lambda: encoded(quarters(), "JPEG", quality=95, subsampling=0), LOSSY),
    Case("png inside.jpg", lambda: encoded(quarters(), "PNG"), QUARTERS),
    Case(
        "truncated.jpg",
        lambda: half(encoded(noise(), "JPEG")),
        Refused("truncated image.*--allow-truncated", Decoded(((102, 115, 255), GREY, GREY, GREY), within=4)),
    ),
    Case(
        "truncated.png",
        lambda: half(encoded(noise(), "PNG")),
        Refused("truncated image.*--allow-truncated", Decoded((*NOISE[:2], K, K))),
    ),
    Case(
        "truncated.bmp",
        lambda: half(encoded(noise(), "BMP")),
        Refused("truncated image", Decoded((K, K, *NOISE[2:]))),
    ),
    Case(
        "truncated.gif",
        lambda: half(encoded(quarters(), "GIF")),
        Refused("truncated image", Decoded((W, W, W, W))),
    ),
    Case(
        "truncated.tif",
        lambda: half(encoded(noise(), "TIFF")),
        Refused("truncated image", Decoded((*NOISE[:2], K, K))),
    ),
    Case("truncated.webp", lambda: half(encoded(noise(), "WEBP")), Refused("damaged image")),
    Case(
        "without its last 2 bytes.jpg",
        lambda: encoded(quarters(), "JPEG", quality=95, subsampling=0)[:-2],
        Refused("truncated image", LOSSY),
    ),
    Case("header only.png", lambda: encoded(quarters(), "PNG")[:33], Refused("found a damaged PNG header")),
    Case(
        "first 10 bytes.jpg",
        lambda: encoded(quarters(), "JPEG")[:10],
        Refused("truncated image: Truncated File Read"),
    ),
    Case(
        "crc of the header.png",
        lambda: flipped(encoded(quarters(), "PNG"), b"IHDR", 17),
        Refused("found a damaged PNG header"),
    ),
    Case("crc of the last chunk.png", lambda: flipped(encoded(noise(), "PNG"), b"IEND", -5), Decoded(NOISE)),
    Case(
        "checksum of the pixels.png",
        lambda: flipped(encoded(noise(), "PNG"), b"IEND", -9),
        Refused("broken data stream"),
    ),
    Case(
        "pixels damaged.png",
        lambda: flipped(encoded(noise(), "PNG"), b"IDAT", 900),
        Refused("damaged image.*broken data stream"),
    ),
    Case("bytes behind the end.png", lambda: encoded(quarters(), "PNG") + b"trailing" * 100, QUARTERS),
    # names
    Case("ünï 画像.png", lambda: encoded(quarters(), "PNG"), QUARTERS),
    Case("two\nlines.png", lambda: encoded(quarters(), "PNG"), QUARTERS),
    Case("two\nlines, damaged.png", lambda: b"damaged", Refused("found text")),
    Case("100%#1?.png", lambda: encoded(quarters(), "PNG"), QUARTERS),
    Case("UPPER.PNG", lambda: encoded(quarters(), "PNG"), QUARTERS),
]
