-- The documents that some tokens belong to, for a list of token ids.
--
-- Grain:   one row per token of the list that is real and in a visible document. No token may be listed twice.
-- Reads:   stg_document_places, stg_shape
-- Units:   position counts from 0 inside the sequence; the document has the tokens first_token_id to end_token_id - 1.
-- Ask it:  from token_owners([0, 4711])
create or replace macro token_owners(ids) as table
select
    token_id,
    document_id,
    key,
    places.source,
    token_id % context_length as position,
    first_token_id,
    end_token_id
from (select unnest(ids)::bigint as token_id) as wanted
asof join stg_document_places as places on wanted.token_id >= places.first_token_id
cross join stg_shape
where token_id < end_token_id;
