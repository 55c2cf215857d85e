-- Every document has as many tokens as its record says, and begins where its record says.
--
-- Grain:   one row per document with a wrong count or start.
-- Reads:   stg_documents, stg_tokens
-- Units:   n_… count real tokens.
-- Ask it:  was a document cut?
with recount as (
    select document_id, count(*) as n_tokens, min(token_id) as first_token_id
    from stg_tokens
    where mask
    group by document_id
)
select
    document_id,
    stg_documents.key,
    stg_documents.n_tokens        as n_tokens_stored,
    coalesce(recount.n_tokens, 0) as n_tokens_counted,
    stg_documents.first_token_id  as first_token_id_stored,
    recount.first_token_id        as first_token_id_counted
from stg_documents
left join recount using (document_id)
where stg_documents.n_tokens is distinct from coalesce(recount.n_tokens, 0)
    or stg_documents.first_token_id is distinct from recount.first_token_id
order by document_id;
