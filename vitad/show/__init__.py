"""What readers see: `tables` of records, `plots`, `widgets`, the `cost` of an image, sheets that `compare` runs."""
