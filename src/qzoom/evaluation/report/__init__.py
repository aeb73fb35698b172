"""From the answers of many runs to one page: curves, tables with intervals, a gallery of failures."""
