-- The tokens at which a feature is strongest, in their context.
--
-- Grain:   one row per token, strongest first; ties in corpus order.
-- Reads:   stg_feature_major (only the row groups of this feature), stg_tokens, stg_vocab, stg_documents,
--          whole_letters
-- Units:   value is in the units of the activations. context shows up to 12 tokens on either side, inside
--          the document, and the token between « and »; such marks in the text itself become ‹ and ›.
-- Parameters: feature bigint, n bigint = 20
-- Ask it:  what does feature 12 stand for?  from top_tokens(12)
create or replace macro top_tokens(feature, n := 20) as table
with best as materialized (
    select token_id, value
    from stg_feature_major
    where feature_id = feature
    order by value desc, token_id
    limit n
),
neighbours as materialized (
    select token_id as centre, unnest(generate_series(token_id - 12, token_id + 12)) as token_id from best
),
windows as materialized (
    select centre, token_id, stg_tokens.vocab_id, stg_tokens.document_id, stg_tokens.position
    from neighbours
    join stg_tokens using (token_id)
),
centres as materialized (
    select token_id, vocab_id, document_id, position from windows where token_id = centre
),
digits as (
    select
        centre,
        coalesce(string_agg(byte_digits, '' order by token_id) filter (where token_id < centre), '') as digits_before,
        coalesce(string_agg(byte_digits, '' order by token_id) filter (where token_id = centre), '') as token_digits,
        coalesce(string_agg(byte_digits, '' order by token_id) filter (where token_id > centre), '') as digits_after
    from windows
    join stg_vocab using (vocab_id)
    where (centre, document_id) in (select (token_id, document_id) from centres)
    group by centre
),
words as (
    select centre as token_id, whole_letters(digits_before, token_digits, digits_after) as word from digits
)
select
    token_id,
    best.value,
    stg_vocab.piece,
    translate(word.text_before, '«»', '‹›')
        || '«' || translate(word.token_text, '«»', '‹›') || '»'
        || translate(word.text_after, '«»', '‹›') as context,
    stg_documents.key,
    stg_documents.source,
    centres.position
from best
join centres using (token_id)
join words using (token_id)
join stg_vocab using (vocab_id)
join stg_documents using (document_id)
order by best.value desc, token_id;
