-- The tokens of a document in order, with a feature's value and the number of features at each.
--
-- Grain:   one row per token, in the document's order: n of them, from the one numbered `first` on.
-- Reads:   stg_document_places, stg_tokens, is_encoded, stg_token_major, token_surroundings
-- Units:   place counts the document's tokens from 0. If the bytes of a letter are spread over several tokens, the
--          letter belongs to the token that begins it, so that the pieces of all rows together are the text. value is
--          the feature's, in the units of the activations, and n_features counts the features that fire; both are 0
--          where nothing fires, and null at tokens that were not encoded. value is null without a feature. role is
--          that of the message, null outside of conversations.
-- Parameters: document_key text, feature bigint = null, first bigint = 0, n bigint = 2000
-- Ask it:  how does feature 12 rise and fall in a chapter?  from document_tokens('austen/emma/chapter-26', 12)
create or replace macro document_tokens(
    document_key,
    feature := null,
    first := 0,
    n := 2000
) as table
with document as materialized (
    select places.first_token_id, places.end_token_id
    from stg_document_places as places
    where places.key = document_key
),
mine as materialized (
    select
        tokens.token_id,
        tokens.vocab_id,
        tokens.position,
        tokens.role,
        tokens.token_id - document.first_token_id as place,
        is_encoded(tokens.token_id, tokens.vocab_id) as could_fire
    from stg_tokens as tokens
    join document
        on tokens.token_id >= document.first_token_id + greatest("first", 0)
        and tokens.token_id < least(document.end_token_id, document.first_token_id + greatest("first", 0) + n)
),
fired as materialized (
    select token_id, feature_id, value from stg_token_major where token_id in (select token_id from mine)
),
counts as (
    select token_id, count(*) as n_features, max(value) filter (where feature_id = feature) as value
    from fired
    group by token_id
),
-- Three more tokens on both sides, because a letter has at most four bytes.
around as (
    select token_id + 1 - place as first_shown, pieces
    from token_surroundings(
        (select [min(token_id)] from mine having count(*) > 0),
        (select list({'token_id': token_id, 'value': value}) from fired where feature_id = feature),
        3,
        greatest(n, 0) + 2
    )
),
spelt as (
    select first_shown + unnest(generate_series(0, len(pieces) - 1)) as token_id, unnest(pieces) as piece from around
)
select
    token_id,
    mine.place,
    mine.position,
    mine.vocab_id,
    spelt.piece,
    case when could_fire and feature is not null then coalesce(counts.value, 0) end as value,
    case when could_fire then coalesce(counts.n_features, 0) end as n_features,
    mine.role
from mine
join spelt using (token_id)
left join counts using (token_id)
order by token_id;
