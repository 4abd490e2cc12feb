#!/usr/bin/env python3
"""Makes the pictures of tests/golden/images that decoded_more.json lists, and that list: what Pillow sees in them.

  tests/golden/make_pictures.py        (Pillow; the list says which version)

All show plain.bmp, 96x72, unless their name says otherwise. Pillow writes no interlaced or 16-bit colour PNG and no YCCK JPEG: the PNG
are written here, the YCCK file is a four-channel JPEG of Pillow's whose channels are Y, Cb, Cr and K and whose Adobe marker says so.
"""
import json
import os
import struct
import zlib

import PIL
from PIL import Image, ImageCms, ImageOps

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "images")
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]  # x, y, step x, step y


def path(name):
    return os.path.join(FOLDER, name)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, colour_type, pixel, interlaced, before_data=b""):
    """`pixel(x, y)` gives the bytes of a pixel."""
    passes = ADAM7 if interlaced else [(0, 0, 1, 1)]
    raw = b""
    for left, top, step_x, step_y in passes:
        for y in range(top, height, step_y):
            row = b"".join(pixel(x, y) for x in range(left, width, step_x))
            if row:
                raw += b"\0" + row
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before_data + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


def ycck(picture):
    """Adobe's inverted YCCK: K holds half of what the three inks share."""
    planes = [bytearray() for _ in range(4)]
    data = picture.tobytes()
    for red, green, blue in zip(data[0::3], data[1::3], data[2::3]):
        white = 255 - (255 - max(red, green, blue)) // 2
        inks = [255 - min(255, round(v * 255 / white)) for v in (red, green, blue)]
        for plane, value in zip(planes, inks + [white]):
            plane.append(value)
    rgb = Image.merge("RGB", [Image.frombytes("L", picture.size, bytes(p)) for p in planes[:3]])
    stored = list(rgb.convert("YCbCr").split()) + [Image.frombytes("L", picture.size, bytes(planes[3]))]
    # Pillow inverts what it writes as CMYK.
    Image.merge("CMYK", [ImageOps.invert(p) for p in stored]).save(path("ycck.jpg"), quality=95)
    with open(path("ycck.jpg"), "rb") as file:
        data = bytearray(file.read())
    marker = data.index(b"\xff\xee\x00\x0eAdobe")
    assert data[marker + 15] == 0
    data[marker + 15] = 2
    with open(path("ycck.jpg"), "wb") as file:
        file.write(data)


def make():
    """The names of the files that must be refused."""
    plain = Image.open(path("plain.bmp")).convert("RGB")
    pixels = plain.load()
    width, height = plain.size
    gray = plain.convert("L")

    def write(name, data):
        with open(path(name), "wb") as file:
            file.write(data)

    ycck(plain)
    rgb = lambda x, y: bytes(pixels[x, y])
    write("interlaced.png", png(width, height, 8, 2, rgb, True))
    wide = lambda x, y: b"".join(bytes([v, v]) for v in pixels[x, y]) + bytes([x, y])  # alpha is noise
    write("interlaced_rgba16.png", png(width, height, 16, 6, wide, True))
    grays = gray.load()
    write("interlaced_gray_tiny.png", png(3, 2, 8, 0, lambda x, y: bytes([grays[30 * x, 30 * y]]), True))  # some passes are empty
    write("rgb_trns.png", png(width, height, 8, 2, rgb, False, chunk(b"tRNS", struct.pack(">HHH", *pixels[5, 5]))))
    write("gray_trns.png", png(width, height, 8, 0, lambda x, y: bytes([grays[x, y]]), False,
                               chunk(b"tRNS", struct.pack(">H", grays[5, 5]))))
    palette = plain.quantize(16)
    palette.save(path("palette_trns.png"), transparency=bytes(range(0, 160, 10)), bits=4)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    profiled = chunk(b"gAMA", struct.pack(">I", 100000)) + chunk(b"iCCP", b"XYZ\0\0" + zlib.compress(profile))
    write("icc_gamma.png", png(width, height, 8, 2, rgb, False, profiled))
    plain.save(path("icc.jpg"), quality=95, subsampling=0, icc_profile=profile)
    write("tall_1x4000.png", png(1, 4000, 8, 2, lambda x, y: bytes([y % 256, y // 16, 255 - y % 256]), False))
    plain.save(path("wrong_extension.png"), format="JPEG", quality=95, subsampling=0)
    odd = plain.crop((0, 0, 83, 61))  # sides that are no multiple of a block
    odd.save(path("odd_420.jpg"), quality=90, subsampling="4:2:0")
    odd.save(path("odd_422.jpg"), quality=90, subsampling="4:2:2")
    odd.save(path("odd_progressive_444.jpg"), quality=90, subsampling="4:4:4", progressive=True)
    plain.quantize(32).save(path("transparent.gif"), transparency=3, interlace=1)
    palette.save(path("palette.bmp"))
    alpha = plain.copy()
    alpha.putalpha(gray.point(lambda v: 64 + v // 2))
    alpha.save(path("alpha.webp"), quality=90, exact=True)

    # Sides that no memory holds.
    refused = ["claims_65535.jpg", "claims_65535.gif", "claims_65535.bmp", "claims_16384.webp"]
    with open(path("baseline_444.jpg"), "rb") as file:
        jpeg = bytearray(file.read())
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5:frame + 9] = b"\xff\xff\xff\xff"
    write("claims_65535.jpg", jpeg[:frame + 2000])
    write("claims_65535.gif", b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;")
    write("claims_65535.bmp", b"BM" + struct.pack("<IHHI", 70, 0, 0, 54) +
          struct.pack("<IiiHHIIiiII", 40, 65535, 65535, 1, 8, 1, 16, 0, 0, 0, 0) + bytes(16))
    write("claims_16384.webp", b"RIFF" + struct.pack("<I", 28) + b"WEBPVP8L" + struct.pack("<I", 16) + b"\x2f\xff\xff\xff\x0f" + bytes(11))
    return refused


def seen(name):
    with Image.open(path(name)) as picture:
        rgb = ImageOps.exif_transpose(picture)
        if rgb.mode == "P" and "transparency" in rgb.info:
            rgb = rgb.convert("RGBA")
        rgb = rgb.convert("RGB")
        data = rgb.tobytes()
        means = [round(sum(data[c::3]) / (rgb.width * rgb.height), 3) for c in range(3)]
        return {"width": rgb.width, "height": rgb.height, "stored": picture.mode, "mean_rgb": means, "crc32": zlib.crc32(data)}


def main():
    refused = make()
    with open(path("decoded.json")) as file:
        before = json.load(file)
    names = sorted(n for n in os.listdir(FOLDER) if n not in before and not n.startswith("expected_") and not n.endswith(".json"))
    lines = []
    for name in names:
        lines.append(f'  "{name}": {json.dumps({"error": "too large"} if name in refused else seen(name))}')
    with open(path("decoded_more.json"), "w") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
    # decoded.json has only means. Pillow turns 16 bits into 8 by cutting, and inks by a rule of its own.
    crcs = {n: seen(n)["crc32"] for n in sorted(before) if "error" not in before[n] and n not in ("gray16.png", "cmyk.jpg")}
    with open(path("decoded_crc32.json"), "w") as file:
        file.write("{\n" + ",\n".join(f'  "{n}": {crc}' for n, crc in crcs.items()) + "\n}\n")
    print(f"Pillow {PIL.__version__}: {len(names)} pictures")


if __name__ == "__main__":
    main()
