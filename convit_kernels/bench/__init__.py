"""Measuring: contenders, time and memory, accuracy, profiles, reports."""
