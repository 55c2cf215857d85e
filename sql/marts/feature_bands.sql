-- Examples of a feature from its strongest to its weakest tokens under a filter, with the values around them.
--
-- Grain:   one row per example, at most n in each band; the strongest band first, and the strongest example first
--          inside it; ties in corpus order.
-- Reads:   under_filter_of_feature, token_windows, token_surroundings, draw_order, strength
-- Units:   bands are those of feature_quantile_examples: equal counts (to within one) of the tokens that the filter
--          lets through, band 1 the strongest; n_tokens, low_value and high_value (magnitudes in a signed run)
--          describe the whole band. Examples are drawn at random; the seed chooses the draw. pieces, feature_values
--          and place are those of contexts; feature_values are all values, whatever the filter. Tokens with the same
--          vocabulary entries around them, in the same order, are shown once, with their number as n_copies: in each
--          band the first 200 tokens drawn are compared. The filter is that of feature_numbers.
-- Parameters: feature bigint, bands bigint = 10, n bigint = 5, before bigint = 12, after bigint = 12, seed bigint = 0,
--          source text = null, document_key text = null, since text = null, until text = null, role text = null,
--          threshold double = 0, with_feature bigint = null, without_feature bigint = null
-- Ask it:  what does feature 12 stand for when it is weak?  from feature_bands(12)
create or replace macro feature_bands(
    feature,
    bands := 10,
    n := 5,
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
ranked as (
    select
        token_id,
        value,
        row_number() over (order by strength(value) desc, token_id) - 1 as rank,
        count(*) over ()                                                as n_rows
    from firing
),
banded as (
    select token_id, value, 1 + rank * least(bands, n_rows) // n_rows as band
    from ranked
    where case when bands >= 1 and n >= 1 then true else error('bands and n must be at least 1') end
),
drawn as materialized (
    select
        band,
        token_id,
        value,
        count(*) over whole_band             as n_tokens,
        min(strength(value)) over whole_band as low_value,
        max(strength(value)) over whole_band as high_value,
        draw_order(token_id, seed)           as draw
    from banded
    window whole_band as (partition by band)
    qualify row_number() over (partition by band order by draw, token_id) <= greatest(n, 200)
),
examples as (
    select drawn.*, count(*) over (partition by band, text_key) as n_copies
    from drawn
    join token_windows((select list(token_id) from drawn), before, after) using (token_id)
    qualify row_number() over (partition by band, text_key order by draw, token_id) = 1
),
chosen as materialized (
    from examples qualify row_number() over (partition by band order by draw, token_id) <= n
)
select
    chosen.band,
    chosen.n_tokens,
    chosen.low_value,
    chosen.high_value,
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
order by chosen.band, strength(chosen.value) desc, token_id;
