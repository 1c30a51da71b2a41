"""The pages under docs/: taken apart, run, given their generated parts, and made into a site by mkdocs."""
