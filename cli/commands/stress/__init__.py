"""Commands that put a finished student to harder tests than questions."""
