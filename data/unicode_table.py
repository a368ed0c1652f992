"""Prints llmc/data/unicode.h, the code points that GPT-2's tokenizer takes for letters and for numbers.

    python3 data/unicode_table.py > llmc/data/unicode.h
"""

import sys
import textwrap
import unicodedata


def runs(category):
    """Lengths of the stretches of code points outside, inside, outside ... the category, from 0 on."""
    lengths, inside, start = [], False, 0
    for code in range(sys.maxunicode + 2):
        member = code <= sys.maxunicode and unicodedata.category(chr(code))[0] == category
        if member != inside:
            lengths.append(code - start)
            inside, start = member, code
    return lengths


def main():
    version = unicodedata.unidata_version
    print(f"""\
// Which code points are letters (\\p{{L}}) and numbers (\\p{{N}}) in Unicode {version}, for data/bpe.h.
// Written by data/unicode_table.py: lengths of the stretches outside, inside, outside ... the class, from 0 on.
#pragma once

#include <cstdint>

// clang-format off""")
    for name, category in (("letter", "L"), ("number", "N")):
        body = textwrap.fill(",".join(map(str, runs(category))).replace(",", ", "), 114)
        print(f"inline constexpr uint16_t {name}_runs[] = {{\n{textwrap.indent(body, '    ')}}};")
    print("// clang-format on")


if __name__ == "__main__":
    main()
