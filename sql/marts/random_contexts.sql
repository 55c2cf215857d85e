-- Tokens drawn at random from all at which a feature fires under a filter, with its values around them.
--
-- Grain:   one row per token, in the order of the draw.
-- Reads:   under_filter_of_feature, token_windows, token_surroundings, draw_order
-- Units:   the seed chooses the draw: see draw_order. pieces, feature_values and place are those of contexts;
--          feature_values are all values, whatever the filter. Tokens with the same vocabulary entries around them, in
--          the same order, are shown once, with their number as n_copies: the first 1,000 tokens drawn are compared.
--          value is in the units of the activations. The filter is that of feature_numbers.
-- Parameters: feature bigint, n bigint = 20, before bigint = 12, after bigint = 12, seed bigint = 0,
--          source text = null, document_key text = null, since text = null, until text = null, role text = null,
--          threshold double = 0, with_feature bigint = null, without_feature bigint = null
-- Ask it:  what does feature 12 usually stand for?  from random_contexts(12)
create or replace macro random_contexts(
    feature,
    n := 20,
    before := 12,
    after := 12,
    seed := 0,
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
drawn as materialized (
    select token_id, value, draw_order(token_id, seed) as draw
    from firing
    order by draw, token_id
    limit greatest(n, 1000)
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
    chosen.value,
    found.place,
    found.pieces,
    found.feature_values,
    chosen.n_copies,
    found.key,
    found.source,
    found.position
from chosen
join token_surroundings(
    (select list(token_id) from chosen),
    (select list(fired) from fired),
    before,
    after
) as found using (token_id)
order by chosen.draw, token_id;
