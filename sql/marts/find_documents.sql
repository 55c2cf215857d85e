-- Documents by key, source or date, a page at a time.
--
-- Grain:   one row per visible document with tokens, in corpus order; at most n.
-- Reads:   under_filter_documents
-- Units:   text is in the key, whatever the case. source, since and until are those of feature_numbers. For the next
--          page give document_id of the last row as after_id. written is in UTC (null if the metadata have no date);
--          n_tokens counts the document's tokens.
-- Parameters: text text = '', source text = null, since text = null, until text = null, after_id bigint = -1,
--          n bigint = 50
-- Ask it:  which documents are about France?  from find_documents('france')
create or replace macro find_documents(
    text := '',
    source := null,
    since := null,
    until := null,
    after_id := -1,
    n := 50
) as table
select
    document_id,
    key,
    places.source,
    written,
    end_token_id - first_token_id as n_tokens,
    first_token_id
from under_filter_documents(source, null, since, until) as places
where document_id > after_id and contains(lower(key), lower(text::varchar))
order by document_id
limit n;
