-- Documents by where they come from: each source is a class.
--
-- saeflow annotate source flows/recipes/annotations/source.sql
select key as document, source as class
from documents
where source is not null
