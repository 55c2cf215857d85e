-- The tokens that belong to each document, and when it was written.
--
-- Grain:   one row per visible document with tokens.
-- Reads:   src_documents (forgotten and replaced documents are left out), as_timestamp
-- Units:   a document has the tokens from first_token_id to end_token_id - 1. A token belongs to the last document that
--          begins at or before it, if the token is not beyond that document's end. written is in UTC: the first of the
--          metadata date, published, published_at, created, created_at, created_utc, timestamp, datetime, time and year
--          that holds a date (null if none does).
-- Ask it:  which document owns token 4711? (asof join on first_token_id, then ask for token_id < end_token_id)
create or replace view stg_document_places as
select
    document_id,
    key,
    dated.source,
    first_token_id,
    first_token_id + n_tokens                   as end_token_id,
    coalesce(
        as_timestamp("date"::varchar),
        as_timestamp(published::varchar),
        as_timestamp(published_at::varchar),
        as_timestamp(created::varchar),
        as_timestamp(created_at::varchar),
        as_timestamp(created_utc::varchar),
        as_timestamp("timestamp"::varchar),
        as_timestamp("datetime"::varchar),
        as_timestamp("time"::varchar),
        as_timestamp("year"::varchar)
    ) as written
from (
    from src_documents
    union all by name
    -- A corpus that lacks such a column gets it, without a value.
    select
        null as "date",
        null as published,
        null as published_at,
        null as created,
        null as created_at,
        null as created_utc,
        null as "timestamp",
        null as "datetime",
        null as "time",
        null as "year"
    where false
) as dated
where first_token_id is not null;
