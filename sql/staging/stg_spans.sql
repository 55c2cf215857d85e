-- The spans of tokens that annotations give a class to.
--
-- Grain:   one row per annotation, class and unbroken span of tokens; no two spans of a class have a token in common.
-- Reads:   src_annotations, src_hidden (spans of forgotten and replaced documents are left out)
-- Units:   a span has the tokens from first_token_id to last_token_id, both included, all of one document.
-- Ask it:  which class has the longest spans?
create or replace view stg_spans as
select spans.annotation, spans.class, spans.document_id, first_token_id, last_token_id
from src_annotations as spans
anti join src_hidden on src_hidden.document_id = spans.document_id;
