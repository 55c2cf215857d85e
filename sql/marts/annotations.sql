-- The classes that tokens and documents were given with `saeflow annotate`.
--
-- Grain:   one row per annotation and class. By annotation, then the largest class first.
-- Reads:   stg_annotations, stg_size
-- Units:   n_spans counts unbroken spans of tokens, n_documents the documents that hold them. share is the share of all
--          real tokens (0 to 1). A token may have several classes. Forgotten documents do not count.
-- Ask it:  which annotations are there, and how common is each class?
create or replace view annotations as
select
    counted.annotation,
    counted.class,
    n_tokens,
    n_spans,
    n_documents,
    n_tokens / nullif(n_real_tokens, 0) as share
from stg_annotations as counted
cross join stg_size
order by counted.annotation, n_tokens desc, counted.class;
