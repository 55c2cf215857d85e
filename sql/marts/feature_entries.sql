-- The vocabulary entries on which a feature fires most often, under a filter.
--
-- Grain:   one row per vocabulary entry, the commonest first; at most n.
-- Reads:   under_filter_of_feature, token_pieces
-- Units:   n_tokens counts the entry's tokens at which the feature fires under the filter; share is their share of all
--          such tokens. mean_value is in the units of the activations. The filter is that of feature_numbers.
-- Parameters: feature bigint, n bigint = 20, source text = null, document_key text = null, since text = null,
--          until text = null, role text = null, threshold double = 0, with_feature bigint = null,
--          without_feature bigint = null
-- Ask it:  on which words does feature 12 fire in the novels?  from feature_entries(12, 20, 'novels')
create or replace macro feature_entries(
    feature,
    n := 20,
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
pieces as materialized (
    from token_pieces((select list(token_id) from firing))
)
select
    vocab_id,
    any_value(piece)                     as piece,
    count(*)                             as n_tokens,
    count(*) / sum(count(*)) over ()     as share,
    avg(value::double)                   as mean_value
from pieces
join firing using (token_id)
group by vocab_id
order by n_tokens desc, vocab_id
limit n;
