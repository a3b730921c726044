"""Models that judge pictures: how well one fits a text, or what it answers to a question."""
