"""What is asked: problems, benchmarks, and their splits."""
