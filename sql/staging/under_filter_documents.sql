-- The documents that a filter lets through, with their tokens.
--
-- Grain:   one row per visible document with tokens.
-- Reads:   stg_document_places, filter_date
-- Units:   null means no filter. `since` is included, `until` is not; with either, documents without a date are left
--          out. A document has the tokens first_token_id to end_token_id - 1.
-- Ask it:  from under_filter_documents('novels', null, '1813', null)
create or replace macro under_filter_documents(source, document_key, since, until) as table
select places.*
from stg_document_places as places
where (source is null or places.source = source)
    and (document_key is null or places.key = document_key)
    and (since is null or places.written >= filter_date('since', since))
    and (until is null or places.written < filter_date('until', until));
