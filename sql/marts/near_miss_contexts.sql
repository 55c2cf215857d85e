-- Tokens of a vocabulary entry at which a feature is silent, under a filter.
--
-- Grain:   one row per silent token, in the order of the draw.
-- Reads:   under_filter_of_feature, under_filter_ids, token_pieces, stg_tokens, is_encoded, token_windows,
--          token_surroundings, draw_order
-- Units:   vocab is the entry; without it, the one on which the feature fires most often under the filter. Only encoded
--          tokens count. The feature is silent if it has no value at all, whatever the threshold, so value is 0.
--          n_silent counts all silent tokens of the entry, n_fired those at which the feature fires, both
--          under the filter. The seed chooses the draw: see draw_order. pieces, feature_values and place are those of
--          contexts; feature_values are all values, whatever the filter. Tokens with the same vocabulary entries
--          around them, in the same order, are shown once, with their number as n_copies: the first 1,000 tokens drawn
--          are compared. The filter is that of feature_numbers.
-- Parameters: feature bigint, n bigint = 20, before bigint = 12, after bigint = 12, seed bigint = 0,
--          vocab bigint = null, source text = null, document_key text = null, since text = null, until text = null,
--          role text = null, threshold double = 0, with_feature bigint = null, without_feature bigint = null
-- Ask it:  what must be around the word for feature 12 to fire?  from near_miss_contexts(12)
create or replace macro near_miss_contexts(
    feature,
    n := 20,
    before := 12,
    after := 12,
    seed := 0,
    vocab := null,
    source := null,
    document_key := null,
    since := null,
    until := null,
    role := null,
    threshold := 0,
    with_feature := null,
    without_feature := null
) as table
with fired as materialized (
    from under_filter_of_feature(
        feature, source, document_key, since, until, role, threshold, with_feature, without_feature
    )
),
firing as (
    select token_id, value from fired where passes
),
entry as materialized (
    select vocab_id, count(token_id) as n_fired
    from (
        select vocab_id, token_id from token_pieces((select list(token_id) from firing))
        union all
        select vocab::bigint, null where vocab is not null
    )
    where vocab is null or vocab_id = vocab
    group by vocab_id
    order by n_fired desc, vocab_id
    limit 1
),
met as materialized (
    select token_id
    from stg_tokens as tokens
    where tokens.mask
        and tokens.vocab_id = (select vocab_id from entry)
        and is_encoded(tokens.token_id, tokens.vocab_id)
        and tokens.token_id not in (select token_id from fired)
),
silent as materialized (
    from under_filter_ids(
        (select list(token_id) from met), source, document_key, since, until, role, with_feature, without_feature
    )
),
drawn as materialized (
    select token_id, draw_order(token_id, seed) as draw from silent order by draw, token_id limit greatest(n, 1000)
),
chosen as materialized (
    select drawn.*, count(*) over (partition by text_key) as n_copies
    from drawn
    join token_windows((select list(token_id) from drawn), before, after) using (token_id)
    qualify row_number() over (partition by text_key order by draw, token_id) = 1
    order by draw, token_id
    limit n
)
select
    token_id,
    0.0::double                   as value,
    found.place,
    found.pieces,
    found.feature_values,
    chosen.n_copies,
    found.key,
    found.source,
    found.position,
    (select count(*) from silent) as n_silent,
    entry.n_fired
from chosen
join token_surroundings(
    (select list(token_id) from chosen), (select list(fired) from fired), before, after
) as found using (token_id)
cross join entry
order by chosen.draw, token_id;
