"""How the pages under docs/ become a site: what mkdocs and mkdocstrings are told beyond mkdocs.yml."""
