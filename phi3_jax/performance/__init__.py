"""What a run costs in memory and time: planned without running it, and measured."""
