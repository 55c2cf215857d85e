"""Pages over the questions of `sql/marts`. Read `server` first.

server       the pages' addresses, and what is refused
pages        one file for each page
panels       a panel: a question with its arguments, its answer, and the SQL that gives it
answers      a page as HTML, JSON, CSV or Parquet
address      filters and paging in an address
connections  DuckDB connections for the pages, and how long a question may take
charts       charts in Vega-Lite, and the script that draws them
directions   where each feature lies on the map
shading      tokens shaded by value, and text that a page may show

`templates/` holds the pages in HTML (Jinja2), `static/` one style sheet and one script.
"""
