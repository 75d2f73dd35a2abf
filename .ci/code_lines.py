"""Print the lines of code in each package below a folder, without blank lines, comments and docstrings."""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
root, counts = Path(sys.argv[1]), Counter[str]()
for file in root.rglob("*.py"):
    text, lines = file.read_text(encoding="utf-8"), set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):  # a string that stands alone documents what is above it
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    counts[file.relative_to(root).parts[0]] += len(lines)
for name, count in (*counts.most_common(), ("in all", counts.total())):
    print(f"{count:7,}  {name}")
