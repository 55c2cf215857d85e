-- The tokens that have a class, to be joined with values, contexts or documents.
--
-- Grain:   one row per class and token that has it, by class and token. Without a class, all classes of the annotation.
-- Reads:   stg_spans
-- Units:   the token lies in the unbroken span from first_token_id to last_token_id, both included, of one document.
-- Parameters: annotation text, class text = null
-- Ask it:  which tokens are numbers?  from annotated_tokens('kinds', 'number')
create or replace macro annotated_tokens(annotation, class := null) as table
select
    spans.class,
    unnest(generate_series(first_token_id, last_token_id)) as token_id,
    document_id,
    first_token_id,
    last_token_id
from stg_spans as spans
where spans.annotation = annotation::varchar and (class::varchar is null or spans.class = class::varchar)
order by spans.class, token_id;
