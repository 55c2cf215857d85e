-- A feature's strongest tokens under a filter, with its value at every token around them, copies once.
--
-- Grain:   one row per token, the strongest first; ties in corpus order.
-- Reads:   under_filter_of_feature, token_windows, token_surroundings, strength
-- Units:   pieces, feature_values and place are those of contexts; feature_values are all values, whatever the filter.
--          Tokens with the same vocabulary entries around them, in the same order, are shown once, with their number
--          as n_copies: the 1,000 strongest tokens are compared. value is in the units of the activations. In a signed
--          run the strongest have the largest magnitude. The filter is that of feature_numbers.
-- Parameters: feature bigint, n bigint = 20, before bigint = 12, after bigint = 12, source text = null,
--          document_key text = null, since text = null, until text = null, role text = null, threshold double = 0,
--          with_feature bigint = null, without_feature bigint = null
-- Ask it:  where is feature 12 strongest in the novels?  from feature_contexts(12, 20, 12, 12, 'novels')
create or replace macro feature_contexts(
    feature,
    n := 20,
    before := 12,
    after := 12,
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
strongest as materialized (
    from firing order by strength(value) desc, token_id limit greatest(n, 1000)
),
best as materialized (
    select token_id, value, count(*) over (partition by text_key) as n_copies
    from strongest
    join token_windows((select list(token_id) from strongest), before, after) using (token_id)
    qualify row_number() over (partition by text_key order by strength(value) desc, token_id) = 1
    order by strength(value) desc, token_id
    limit n
)
select
    token_id,
    best.value,
    found.place,
    found.pieces,
    found.feature_values,
    best.n_copies,
    found.key,
    found.source,
    found.position
from best
join token_surroundings(
    (select list(token_id) from best),
    (select list(fired) from fired),
    before,
    after
) as found using (token_id)
order by strength(best.value) desc, token_id;
