"""What training makes small: functions of log-probabilities and a batch."""
