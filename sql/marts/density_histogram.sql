-- How the densities of features are distributed.
--
-- Grain:   one row per bin with features, the rarest first.
-- Reads:   stg_summaries
-- Units:   a bin is a quarter of a power of ten. It holds the densities from from_density to below to_density, shares
--          of the encoded tokens. Features that never fire have a row of their own, from 0 to 0.
-- Ask it:  are there features that fire nearly everywhere?
create or replace view density_histogram as
select
    coalesce(pow(10, bin / 4), 0)       as from_density,
    coalesce(pow(10, (bin + 1) / 4), 0) as to_density,
    n_features
from (
    select case when density > 0 then floor(4 * log10(density)) end as bin, count(*) as n_features
    from stg_summaries
    group by bin
)
order by from_density;
