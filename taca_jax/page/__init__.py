"""The page: plain attention and TACA side by side in a browser, step by step and word by word."""
