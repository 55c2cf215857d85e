"""Pages over the questions of `sql/marts`. Read `server` first.

server       the pages' addresses, and what is refused
pages        one file for each page
panels       a panel: a question with its arguments, its answer, and the SQL that gives it
answers      a page as HTML, JSON, CSV or Parquet
address      filters and paging in an address
connections  DuckDB connections for the pages, and how long a question may take
charts       charts in Vega-Lite, and the script that draws them
directions   where each feature lies on the map
notebook     a run in a notebook
shading      tokens shaded by value, and text that a page may show
pictures     charts as SVG and PNG, and the charts of a report
report       a report of a run: one file, and its pictures
export       a static copy of the pages of a run
static_copy  a page as a file: where its links lead
output       a folder that saeflow may write into

`templates/` holds the pages in HTML (Jinja2), `static/` one style sheet and one script.
"""
