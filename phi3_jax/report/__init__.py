"""Pages that show what came of a run or an evaluation: figures, charts, statistics."""
