-- Examples of a feature from its strongest to its weakest tokens, so that its peaks alone do not mislead.
--
-- Grain:   one row per example, at most n in each band; the strongest band first, and the strongest example first
--          inside it; ties in corpus order.
-- Reads:   tokens_of_feature, token_texts, draw_order, strength
-- Units:   bands are quantiles, sampled as by Paulo et al. 2024 (arXiv 2410.13928): the feature's tokens are ordered by
--          value and cut into bands of equal counts (to within one; equal values in corpus order); band 1 is the
--          strongest. Examples are drawn at random from the whole band; the seed chooses the draw. n_tokens,
--          low_value and high_value describe the whole band. Values are in the units of the activations; context shows
--          12 tokens on either side. In a signed run the order, low_value and high_value are those of magnitudes.
-- Parameters: feature bigint, bands bigint = 10, n bigint = 5, seed bigint = 0
-- Ask it:  what does feature 12 stand for when it is weak?  from feature_quantile_examples(12)
create or replace macro feature_quantile_examples(feature, bands := 10, n := 5, seed := 0) as table
with ranked as (
    select
        token_id,
        value,
        row_number() over (order by strength(value) desc, token_id) - 1 as rank,
        count(*) over ()                                      as n_rows
    from tokens_of_feature(feature)
),
banded as (
    select
        *,
        1 + rank * least(bands, n_rows) // n_rows as band
    from ranked
    where case when bands >= 1 and n >= 1 then true else error('bands and n must be at least 1') end
),
chosen as materialized (
    select
        band,
        token_id,
        value,
        count(*) over whole_band   as n_tokens,
        min(strength(value)) over whole_band as low_value,
        max(strength(value)) over whole_band as high_value
    from banded
    window whole_band as (partition by band)
    qualify row_number() over (partition by band order by draw_order(token_id, seed), token_id) <= n
)
select
    chosen.band,
    chosen.n_tokens,
    chosen.low_value,
    chosen.high_value,
    token_id,
    chosen.value,
    found.piece,
    found.context,
    found.key,
    found.source,
    found.position
from chosen
join token_texts((select list(token_id) from chosen), 12, 12) as found using (token_id)
order by chosen.band, strength(chosen.value) desc, token_id;
