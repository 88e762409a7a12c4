"""The five-minute demo: a small invented harbour taught to a small language model."""
