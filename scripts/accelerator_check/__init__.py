"""What `scripts/check_accelerator.py` checks and measures, stage by stage."""
