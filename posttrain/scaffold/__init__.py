"""Templates of folders that `posttrain new` and `posttrain init` write."""
