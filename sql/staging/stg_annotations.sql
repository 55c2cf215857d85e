-- The classes of each annotation, with what has them.
--
-- Grain:   one row per annotation and class that some visible token has.
-- Reads:   src_annotations, src_hidden (forgotten and replaced documents do not count)
-- Units:   counts; n_documents counts documents with at least one token of the class.
-- Ask it:  which annotations are there?
create or replace view stg_annotations as
select
    spans.annotation,
    spans.class,
    sum(last_token_id - first_token_id + 1)::bigint as n_tokens,
    count(*) as n_spans,
    count(distinct spans.document_id) as n_documents
from src_annotations as spans
anti join src_hidden on src_hidden.document_id = spans.document_id
group by spans.annotation, spans.class;
