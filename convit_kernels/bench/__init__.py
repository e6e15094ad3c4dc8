"""Measuring: implementations, time and memory, accuracy, profiles, reports."""
