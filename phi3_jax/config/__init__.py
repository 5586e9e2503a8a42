"""What is configured: models, adapters, runs and answers, under the names that others gave these settings."""
