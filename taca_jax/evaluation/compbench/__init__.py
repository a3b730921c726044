"""T2I-CompBench: its pictures, their scores, and the table of the TACA paper.

Huang et al. 2023 (arXiv:2307.06350) and 2025 (T2I-CompBench++, TPAMI). The layout of folders and
result files is that of its repository, github.com/Karine-Huang/T2I-CompBench ("upstream" here), so
that its own scorers read our pictures and we read their results.
"""
