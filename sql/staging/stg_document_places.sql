-- The tokens that belong to each document, hidden documents too.
--
-- Grain:   one row per document with tokens.
-- Reads:   src_documents, src_hidden
-- Units:   a document has the tokens from first_token_id to end_token_id - 1. A token belongs to the last document that
--          begins at or before it, if the token is not beyond that document's end.
-- Ask it:  which document owns token 4711? (asof join on first_token_id, then ask for token_id < end_token_id)
create or replace view stg_document_places as
select
    document_id,
    key,
    source,
    first_token_id,
    first_token_id + n_tokens                   as end_token_id,
    document_id in (select document_id from src_hidden) as is_hidden
from src_documents
where first_token_id is not null;
