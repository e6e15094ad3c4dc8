"""Ten minutes on a GPU: `tools/gpu_day.sh`."""
