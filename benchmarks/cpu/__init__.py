"""Speed on CPUs, beside peers and below libraries."""
