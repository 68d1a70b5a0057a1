"""Rewrites a linked Linux kernel (ELF64) without the padding between its parts: pack-elf.py IN OUT

The linker aligns every part of a kernel to 2 MiB, in memory and in the file, and fills the space in the text with
0xcc (int3). In memory that stays as it is; in the file each part moves to the next page boundary, and the fill is
left out: nothing jumps there, and guest memory that no segment covers is simply never touched. A third of the file
goes. Addresses keep their offset within a page, so that a VMM can still map the file. Sections and symbols go, too.
"""

import struct
import sys

PAGE = 4096
LOAD, NOTE = 1, 4
FILL = b"\xcc" * PAGE
HEADER, SEGMENT = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ")


def runs(data):
    """(start, end) of the parts of data between runs of filled pages."""
    start = None
    for at in range(0, len(data), PAGE):
        if data[at:at + PAGE] == FILL:
            if start is not None:
                yield start, at
            start = None
        elif start is None:
            start = at
    if start is not None:
        yield start, len(data)


def main(source, target):
    image = open(source, "rb").read()
    header = list(HEADER.unpack_from(image))
    segments = [SEGMENT.unpack_from(image, header[5] + i * header[9]) for i in range(header[10])]
    loads, notes = [], []
    for kind, flags, offset, virtual, physical, in_file, in_memory, _ in segments:
        data = image[offset:offset + in_file]
        if kind == LOAD:
            for start, end in runs(data):
                length = in_memory - start if end == in_file else end - start
                loads.append((flags, offset + start, virtual + start, physical + start, data[start:end], length))
        elif kind == NOTE:
            notes.append((flags, offset, virtual, physical, in_file))
    out = bytearray(HEADER.size + SEGMENT.size * (len(loads) + len(notes)))
    table = []
    for flags, offset, virtual, physical, data, length in loads:
        out += bytes(-len(out) % PAGE)
        out += bytes(physical % PAGE)
        table.append((LOAD, flags, len(out), virtual, physical, len(data), length, PAGE))
        for note_flags, note, note_virtual, note_physical, size in notes:
            if offset <= note < offset + len(data):
                place = len(out) + note - offset
                table.append((NOTE, note_flags, place, note_virtual, note_physical, size, size, 4))
        out += data
    header[5], header[6], header[10:14] = HEADER.size, 0, (len(table), 0, 0, 0)
    HEADER.pack_into(out, 0, *header)
    for i, segment in enumerate(table):
        SEGMENT.pack_into(out, HEADER.size + i * SEGMENT.size, *segment)
    open(target, "wb").write(out)


main(*sys.argv[1:])
